"""One file per noun: its pages (`pages`) and its API (`api`). `app.main` includes both routers of every file in this package."""
