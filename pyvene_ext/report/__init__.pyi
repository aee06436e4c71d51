from .attention import attention_page as attention_page
from .page import write_report as write_report
from .run import Run as Run
