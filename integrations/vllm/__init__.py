"""rlloss with vLLM: sampling."""
