"""What bodies and answers look like, and the OpenAPI document made of that."""
