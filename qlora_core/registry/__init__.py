"""MLflow logging, adapter versions, aliases, the promotion gate, and the way back: the only home of mlflow."""
