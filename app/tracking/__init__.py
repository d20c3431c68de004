"""Jobs in trackers: their stored events sent to Weights & Biases, MLflow, Trackio and TensorBoard, after the fact and exactly as far as they go."""
