"""Text in and out: prompts become token ids, answers text, and templates what a reward model reads of both."""
