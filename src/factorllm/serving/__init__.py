"""One OpenAI address in front of engines' own servers: which of them answers a request, and when."""
