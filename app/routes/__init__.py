"""One file per noun: its pages (`pages`) and its API (`api`). `app.main` includes whatever it finds here."""
