"""rlloss with transformers: the lm_head of a model, sampling, callbacks of its Trainer."""
