"""The proof that every method carries: small experiments that can fail, and their verdicts."""
