"""The embedded demo model: a small real decoder trained on the standard library's English."""

from __future__ import annotations

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""A Hugging Face model folder: llama-shaped, 12 blocks, float16."""

HELDOUT_TEXT = Path(__file__).parent / "heldout.txt"
"""Docstrings of the modules that the model has not seen, to measure on."""

CALIBRATION_TEXT = Path(__file__).parent / "calibration.txt"
"""A stretch of the text that the model was trained on, to calibrate on."""

__all__ = ["CALIBRATION_TEXT", "HELDOUT_TEXT", "MODEL_FOLDER"]
