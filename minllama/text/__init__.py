"""Files of text to batches of ids: labelled sentences, prompts, plain text."""
