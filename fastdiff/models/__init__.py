"""The bundled models, their checkpoints, and what the engine accelerates inside the models of others."""
