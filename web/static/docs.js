// Swagger UI over this service's own document; it asks nobody else, the validator of swagger.io included.
SwaggerUIBundle({url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, tryItOutEnabled: true});
