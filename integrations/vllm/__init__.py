"""rlloss for vLLM: sampling with an entropy-dependent temperature."""
