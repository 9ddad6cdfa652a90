"""What a recipe did to a model, as one HTML page that needs no network."""

from rolora_passes.reporting.page import write_page
from rolora_passes.reporting.report import gather, report_html

__all__ = ["gather", "report_html", "write_page"]
