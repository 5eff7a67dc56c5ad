"""Distillation losses: one module per method."""

from lkd.losses.ab import AB
from lkd.losses.at import AT
from lkd.losses.backbonekd import BackboneKD
from lkd.losses.base import DistillLoss, named_terms
from lkd.losses.byot import BYOT
from lkd.losses.catkd import CATKD
from lkd.losses.cc import CC
from lkd.losses.cirkd import CIRKD
from lkd.losses.cirkd_channel import CIRKDChannel
from lkd.losses.composite import CompositeLoss, WeightedSum
from lkd.losses.crd import CRD
from lkd.losses.crosskd import CrossKD
from lkd.losses.cskd import CSKD
from lkd.losses.ctkd import CTKD, InstanceCTKD
from lkd.losses.cwd import CWD
from lkd.losses.deit import DeiT
from lkd.losses.dist import DIST
from lkd.losses.distplus import DISTPlus
from lkd.losses.dkd import DKD
from lkd.losses.dsd import DSD
from lkd.losses.fbkd import FBKD
from lkd.losses.fgd import FGD
from lkd.losses.fitnet import FitNet
from lkd.losses.fsp import FSP
from lkd.losses.ft import FT
from lkd.losses.ickd import ICKD
from lkd.losses.ifvd import IFVD
from lkd.losses.kd import KD
from lkd.losses.kdsvd import KDSVD
from lkd.losses.kta import KTA
from lkd.losses.ld import LD
from lkd.losses.logit_mse import LogitMSE
from lkd.losses.logit_standardization import LogitStandardization
from lkd.losses.maskd import MasKD
from lkd.losses.mgd import MGD
from lkd.losses.mlkd import MLKD
from lkd.losses.multi_teacher import MultiTeacher
from lkd.losses.nkd import NKD
from lkd.losses.nst import NST
from lkd.losses.ofakd import OFAKD
from lkd.losses.ofd import OFD
from lkd.losses.pad import PAD
from lkd.losses.peranchor import PerAnchor
from lkd.losses.perpixel import PerPixel
from lkd.losses.pkd import PKD
from lkd.losses.pkt import PKT
from lkd.losses.reviewkd import ReviewKD
from lkd.losses.rkd import RKD
from lkd.losses.rld import RLD
from lkd.losses.semckd import SemCKD
from lkd.losses.simkd import SimKD
from lkd.losses.skd import SKD
from lkd.losses.skds import SKDS
from lkd.losses.sp import SP
from lkd.losses.srd import SRD
from lkd.losses.srrl import SRRL
from lkd.losses.sskd import SSKD
from lkd.losses.tfkd import TfKD
from lkd.losses.ttm import TTM, WTTM
from lkd.losses.uskd import USKD
from lkd.losses.vid import VID
from lkd.losses.vitkd import ViTKD
from lkd.losses.wsld import WSLD

__all__ = [
    "AB",
    "AT",
    "BYOT",
    "CATKD",
    "CC",
    "CIRKD",
    "CRD",
    "CSKD",
    "CTKD",
    "CWD",
    "DIST",
    "DKD",
    "DSD",
    "FBKD",
    "FGD",
    "FSP",
    "FT",
    "ICKD",
    "IFVD",
    "KD",
    "KDSVD",
    "KTA",
    "LD",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFAKD",
    "OFD",
    "PAD",
    "PKD",
    "PKT",
    "RKD",
    "RLD",
    "SKD",
    "SKDS",
    "SP",
    "SRD",
    "SRRL",
    "SSKD",
    "TTM",
    "USKD",
    "VID",
    "WSLD",
    "WTTM",
    "BackboneKD",
    "CIRKDChannel",
    "CompositeLoss",
    "CrossKD",
    "DISTPlus",
    "DeiT",
    "DistillLoss",
    "FitNet",
    "InstanceCTKD",
    "LogitMSE",
    "LogitStandardization",
    "MasKD",
    "MultiTeacher",
    "PerAnchor",
    "PerPixel",
    "ReviewKD",
    "SemCKD",
    "SimKD",
    "TfKD",
    "ViTKD",
    "WeightedSum",
    "named_terms",
]
