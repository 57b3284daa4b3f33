"""Does it learn, and is it the adaptive rank that helps? README.md here says how to run it, RESULTS.md what came out."""
