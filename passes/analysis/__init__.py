"""What passes measure before they decide: frozen values, nothing edited."""
