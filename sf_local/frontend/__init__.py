"""The engine as a backend of SGLang's frontend language. Only this package imports sglang."""
