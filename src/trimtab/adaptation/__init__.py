"""After deployment, on the stream: adapters that follow a shift without labels."""
