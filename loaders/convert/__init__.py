"""From what people download to `.beton`: images found, judged and written; a stopped conversion continues."""
