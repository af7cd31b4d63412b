"""The page that segments photos in a browser: `build` writes its folder, and `serve` serves it."""
