"""From logits to tokens. Knows no grammars and no requests but their parameters."""
