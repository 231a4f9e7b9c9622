"""Other people's tools: one file a tool, which only its users import (`apollo_optim.integrations.transformers`)."""
