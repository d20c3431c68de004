"""The part of Luthier with torch: training and inference. It imports `app`; nothing imports it."""
