"""From text files to deterministic batches of tokens; free of any framework."""
