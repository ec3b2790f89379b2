"""GET /docs: Swagger UI over the OpenAPI document, its files served from here."""

from __future__ import annotations

from flask import Flask
from flask_swagger_ui import get_swaggerui_blueprint

from web.guard import needs


def init_app(app: Flask) -> None:
    """Serve Swagger UI at /docs.

    The package's page holds an inline script, which the Content-Security-Policy refuses:
    `templates/index.template.html` takes its place, since an application's templates come before a blueprint's.
    """
    app.register_blueprint(get_swaggerui_blueprint("/docs", "/openapi.json", blueprint_name="docs"))
    app.add_url_rule("/docs", endpoint="docs.show")  # without a redirect to /docs/
    needs(None)(app.view_functions["docs.show"])
