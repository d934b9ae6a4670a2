"""The text that a model is calibrated, healed and measured on: read, sampled, packed, and split by documents."""

from factorllm.text.calibration import CalibrationText, read_calibration_text

__all__ = ["CalibrationText", "read_calibration_text"]
