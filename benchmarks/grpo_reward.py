"""The reward of ``grpo_vs_trl.py``: how many of the answer's characters are vowels. Fast, and not the same for all."""


def vowels(completions, **kwargs):
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
