"""Jobs, and the workers that make their videos."""
