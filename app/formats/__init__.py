"""The registry of dataset formats: the folder itself. One file per format, one class per file.

A *normalised row* is a dict of one of these shapes; it is what the Parquet file of a dataset holds and what the trainer
reads, so nothing after this folder knows which keys a person's file used:

    chat            {"messages": [{"role", "content", "weight"?: 0|1, "name"?, "tool_calls"?}, …], "tools"?: […]}
    instruction     {"messages": [system?, user, assistant]}
    completion      {"prompt": str, "completion": str}
    plain text      {"text": str}
    preference      {"messages": […], "chosen": [message, …], "rejected": [message, …], "tools"?: […]}
    classification  {"text": str, "label": str}

Any of them may carry "metadata": {column: value} with the columns that no field of the format claimed.
"""
