"""Serving: engines' own servers, and one OpenAI address in front of them: which answers a request, and when."""
