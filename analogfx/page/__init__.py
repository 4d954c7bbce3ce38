"""Results as one HTML file: tables and pictures, no script, nothing loaded from elsewhere."""
