"""Ways to the engine: SGLang, files of requests, a terminal, llm. Only it imports sglang."""
