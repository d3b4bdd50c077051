"""Self-contained HTML pages and their charts, whatever they are about."""
