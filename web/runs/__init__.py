"""Plans that run: our own calls, and those of OpenAI's API, which many clients speak."""
