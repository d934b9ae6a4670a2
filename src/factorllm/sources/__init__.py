"""Where models and texts come from."""

from factorllm.sources.model import SUPPORTED_FAMILIES, ModelSource, open_model
from factorllm.sources.text import CalibrationText, read_calibration_text

__all__ = ["SUPPORTED_FAMILIES", "CalibrationText", "ModelSource", "open_model", "read_calibration_text"]
