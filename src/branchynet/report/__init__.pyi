from .gallery import Gallery as Gallery
from .html import RunReport as RunReport
from .html import write_report as write_report
from .plots import figure_leaving as figure_leaving
from .plots import figure_scores as figure_scores
from .plots import figure_shares as figure_shares
from .plots import figure_tradeoff as figure_tradeoff
