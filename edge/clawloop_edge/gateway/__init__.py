"""The HTTP side: OpenAI-compatible calls in, streamed answers out, a copy to the recorder."""
