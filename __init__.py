"""modelathe: compiler passes that reshape trained models and lower them to files that deploy.

Import from the layers: `modelathe.ir`, `modelathe.passes`, `modelathe.backends`.  This file
holds nothing else on purpose: pytest imports the checkout folder as a second package, and whatever
stood here would exist twice.
"""
