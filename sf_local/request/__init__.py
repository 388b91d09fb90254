"""Plain data: parameters, requests, prompts, batches and outputs. Imports only errors."""
