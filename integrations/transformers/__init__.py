"""rlloss for models and the Trainer of transformers: access to the lm_head, sampling, callbacks."""
