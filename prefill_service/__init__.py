"""The prefill role: computes prompts in chunks and hands their KV over."""
