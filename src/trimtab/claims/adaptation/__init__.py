"""Claims about adapters, on a synthetic world that runs in seconds."""
