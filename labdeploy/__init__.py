"""Deploy tuned LLM services to your own machines over SSH, with a way back."""

__version__ = "0.1.0"
