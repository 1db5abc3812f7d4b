"""The HTTP API: routes, schema, authentication, uploads and errors in the shape of OpenAI's."""
