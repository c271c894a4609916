"""What the labels of trained networks mean in SNOMED CT: one table, for drafts of manifests.

A label is matched word by word, whatever the order, punctuation and spelling; left and right become a side. Must never guess: a label
that isn't in the table gets the code for tissue, which claims nothing, and says that it isn't known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from dicomnode.findings import Code, Laterality

STRUCTURE = Code(value="91723000", scheme="SCT", meaning="Anatomical Structure")  # CID 7150
ABNORMAL = Code(value="49755003", scheme="SCT", meaning="Morphologically Abnormal Structure")
SUBSTANCE = Code(value="91720002", scheme="SCT", meaning="Body Substance")
TISSUE = Code(value="85756007", scheme="SCT", meaning="Tissue")

NORMAL = Code(value="17621005", scheme="SCT", meaning="Normal")  # CID 7194


@dataclass(frozen=True, kw_only=True)
class Term:
    """A label's meaning. `exact` is False where the code says less than the label, or nothing of it."""

    category: Code
    type: Code
    site: Code | None
    side: Laterality | None
    exact: bool

    @property
    def is_abnormal(self) -> bool:
        """Whether each connected component of it is a finding of its own, as of lesions and never of organs."""
        return self.category == ABNORMAL


# name, other name = [~] code meaning [@ code meaning of the site]; ~ marks a code that says less than the label.
# Codes are those of PS3.16 (CID 4, 7151 ff., 7603) with their printed meanings; what PS3.16 lacks is from SNOMED CT itself:
# the single ribs, gluteal and iliopsoas muscles, deep muscles of the back, myocardium, cortex of the kidney.
_STRUCTURES = """
abdomen = 818981001 Abdomen
adrenal gland, adrenal = 23451007 Adrenal gland
airway = 89187006 Airway structure
amygdala = 4958002 Amygdala
aorta = 15825003 Aorta
appendage atrial left, appendage atrial left heart = 33626005 Left auricular appendage
artery = 51114001 Artery
autochthon = 244849004 Deep muscle of back
bladder, bladder urinary = 89837001 Bladder
bone = 3138006 Bone
brachiocephalic trunk, brachiocephalic artery = 12691009 Innominate artery
brachiocephalic vein = 8887007 Innominate vein
brain = 12738006 Brain
brain stem, brainstem = 119238007 Brain Stem
breast = 76752008 Breast
bronchus, bronchi = 955009 Bronchus
caudate, caudate nucleus = 11000004 Caudate Nucleus
cerebellum = 113305005 Cerebellum
cerebellum exterior, cerebellar cortex = 25991003 Cerebellar Cortex
cerebellum white matter, cerebellar white matter = 33060004 Cerebellar White Matter
cerebral cortex, cortex cerebral = 40146001 Cerebral cortex
cerebral white matter = 68523003 Cerebral White Matter
cervix = 71252005 Cervix
clavicle, clavicula = 51299004 Clavicle
colon = 71854001 Colon
common carotid artery = 32062004 Common carotid artery
coronary artery, coronary arteries = 41801008 Coronary artery
costal cartilage, costal cartilages = 50016007 Costal Cartilage
duodenum = 38848004 Duodenum
erector spinae = 44947003 Erector spinae muscle
esophagus = 32849002 Esophagus
eye = 81745001 Eye
face = 89545001 Face
fat = 55603005 Fat
femur = 71341001 Femur
fibula = 87342007 Fibula
fourth ventricle, 4th ventricle = 35918002 Fourth Ventricle
gallbladder, gall bladder = 28231008 Gallbladder
gluteus maximus = 206007 Gluteus maximus muscle
gluteus medius = 78333006 Gluteus medius muscle
gluteus minimus = 75297007 Gluteus minimus muscle
gray matter = 389081007 Gray Matter
head = 69536005 Head
heart = 80891009 Heart
hepatic vein = 8993003 Hepatic vein
hepatic vessel, hepatic vessels = ~59820001 Blood Vessel @ 10200004 Liver
hip = 29836001 Hip
hippocampus = 5366008 Hippocampus
anterior hippocampus, hippocampus head = ~5366008 Hippocampus
posterior hippocampus, hippocampus body tail = ~5366008 Hippocampus
humerus = 85050009 Humerus
iliac artery, common iliac artery = 73634005 Common iliac artery
iliac vena, iliac vein, common iliac vein = 46027005 Common iliac vein
iliopsoas = 68455001 Iliopsoas muscle
inf lat vent, inferior lateral ventricle = 53118009 Inferior Horn of Lateral Ventricle
inferior vena cava, ivc, postcava = 64131007 Inferior vena cava
kidney, kideny = 64033007 Kidney
cortex kidney, renal cortex = 50403003 Renal cortex @ 64033007 Kidney
medulla, kidney medulla, renal medulla = ~64033007 Kidney
pelvicalyceal system, renal pelvis = 25990002 Renal pelvis @ 64033007 Kidney
larynx = 4596009 Larynx
lateral ventricle = 66720007 Lateral Ventricle
atrium left heart, atrium left = 82471001 Left atrium
ventricle left heart, ventricle left, lv, lv pool, left ventricle blood pool, left ventricular cavity, lv cavity = 87878005 Left ventricle
atrium right heart, atrium right = 73829009 Right atrium
ventricle right heart, ventricle right, rv, rv pool, right ventricle blood pool, rv cavity = 53085002 Right ventricle
liver = 10200004 Liver
lung, lungs = 39607008 Lung
lower lobe lung, lower lung lobe = 90572001 Lower lobe of lung
middle lobe lung right, middle lung lobe right = 72481006 Middle lobe of right lung
upper lobe lung, upper lung lobe = 45653009 Upper lobe of lung
lymph node, lymph nodes = 59441001 Lymph Node
mandible = 91609006 Mandible
mediastinum = 72410000 Mediastinum
muscle, skeletal muscle = 91727004 Muscle
myocardium, heart myocardium, lv myocardium, left ventricle myocardium, left ventricular myocardium = 74281007 Myocardium @ 80891009 Heart
nucleus accumbens, accumbens area = 427667007 Nucleus Accumbens
pallidum, globus pallidus = 14738005 Globus Pallidus
pancreas = 15776009 Pancreas
parotid, parotid gland = 45289007 Parotid gland
patella = 64234005 Patella
pelvis = 816092008 Pelvis
portal vein = 32764006 Portal vein
portal vein splenic, portal splenic veins, portal veins splenic, portal vein splenic vein = 110765007 Portal vein and splenic vein
prostate = 41216001 Prostate
central gland, central gland prostate = ~41216001 Prostate
peripheral zone, peripheral zone prostate = 279706003 Peripheral zone of the prostate @ 41216001 Prostate
transition zone, transition zone prostate, transitional zone = 399384005 Transition zone of the prostate @ 41216001 Prostate
pulmonary artery = 81040000 Pulmonary artery
pulmonary vein = 122972007 Pulmonary vein
putamen = 89278009 Putamen
rectum = 34402009 Rectum
renal artery = 2841007 Renal artery
renal vein = 56400007 Renal vein
rib, ribs = 113197003 Rib
sacrum = 54735007 Sacrum
scapula = 79601000 Scapula
seminal vesicle, seminal vesicles = 64739004 Seminal Vesicle
skin = 39937001 Skin
skull = 89546000 Skull
small bowel, small intestine = 30315005 Small intestine
spinal cord = 2748008 Spinal cord
spleen = 78961009 Spleen
sternum = 56873002 Sternum
stomach = 69695003 Stomach
subclavian artery = 36765005 Subclavian artery
submandibular gland = 54019009 Submandibular gland
superior vena cava, svc = 48345005 Superior vena cava
testis = 40689003 Testis
thalamus, thalamus proper = 42695009 Thalamus
third ventricle, 3rd ventricle = 49841001 Third ventricle
thorax, chest = 816094009 Chest
thymus = 9875009 Thymus
thyroid, thyroid gland = 69748006 Thyroid
tongue = 21974007 Tongue
trachea = 44567001 Trachea
ureter = 87953007 Ureter
uterus = 35039007 Uterus
vein = 29092000 Vein
ventral dc, ventral diencephalon = DCM:110700 Ventral Diencephalon
ventricles, ventricle brain, brain ventricles = 35764002 Brain ventricle
vertebra, vertebrae = 51282000 Vertebra
white matter = 389080008 White Matter
"""
_RIBS = [
    "48535007", "78247007", "25888004", "25523003", "15339008", "59558009", "24915002", "5953002", "22565002", "77644006", "58830002",
    "43993008",
]  # fmt: skip
_ORDINALS = ["First", "Second", "Third", "Fourth", "Fifth", "Sixth", "Seventh", "Eighth", "Ninth", "Tenth", "Eleventh", "Twelfth"]
_VERTEBRAE = {
    "C": "14806007 39976000 113205007 5329002 36978003 36054005 87391001",
    "T": "64864005 53733008 1626008 73071006 56401006 45296009 62487009 11068009 82687006 7610001 12989004 23215003",
    "L": "66794005 14293000 36470004 11994002 49668003",
    "S": "65985001",
}
_ABNORMAL = """
abscess = 44132006 Abscess
brain tumor, whole tumor, glioma, wt = 108369006 Neoplasm @ 12738006 Brain
tumor core, tc = ~108369006 Neoplasm @ 12738006 Brain
enhancing tumor, et, gd enhancing tumor, enhancing, active tumor = NCIt:C113842 Enhancing Lesion @ 12738006 Brain
non enhancing tumor, nonenhancing tumor, non enhancing tumor core = NCIt:C81175 Non-Enhancing Lesion @ 12738006 Brain
edema, peritumoral edema, ed = 79654002 Edema @ 12738006 Brain
necrosis, necrotic, necrotic core, necrotic tumor core, necrotic non enhancing tumor core = 6574001 Necrosis @ 12738006 Brain
brain metastasis, brain metastases = 14799000 Neoplasm, Secondary @ 12738006 Brain
brain lesion, stroke lesion, ischemic lesion, white matter lesion, ms lesion = 301766008 Lesion of Brain @ 12738006 Brain
white matter hyperintensity, wmh = DCM:110702 White Matter T2 Hyperintensity @ 12738006 Brain
intracranial hemorrhage, intracerebral hemorrhage, brain hemorrhage = 50960005 Hemorrhage @ 12738006 Brain
hemorrhage, bleeding = 50960005 Hemorrhage
lung nodule, pulmonary nodule, nodule lung = 27925004 Nodule @ 39607008 Lung
lung lesion, pulmonary lesion = 52988006 Lesion @ 39607008 Lung
lung tumor, lung cancer, lung neoplasm = 108369006 Neoplasm @ 39607008 Lung
covid lesion, covid 19 lesion, covid, covid 19, covid infection, lung infection = ~DCM:112121 Infiltrate @ 39607008 Lung
pneumonia, pneumonia positive, bacterial pneumonia, viral pneumonia = ~DCM:112121 Infiltrate @ 39607008 Lung
infiltrate, infiltration, consolidation = DCM:112121 Infiltrate @ 39607008 Lung
ground glass opacity, ggo, ground glass = DCM:112120 Ground glass opacity @ 39607008 Lung
lung opacity, opacity = DCM:112001 Opacity @ 39607008 Lung
pneumothorax = 36118008 Pneumothorax @ 816094009 Chest
pleural effusion, effusion = 60046008 Pleural effusion @ 816094009 Chest
cardiomegaly = 287272002 Cardiomegaly @ 80891009 Heart
liver tumor, hepatic tumor, liver cancer, hepatic neoplasm = 108369006 Neoplasm @ 10200004 Liver
liver lesion, hepatic lesion = 52988006 Lesion @ 10200004 Liver
liver cyst, hepatic cyst = 367643001 Cyst @ 10200004 Liver
pancreatic tumor, pancreas tumor, pancreas cancer, pancreatic cancer = 108369006 Neoplasm @ 15776009 Pancreas
pancreatic lesion, pancreas lesion = 52988006 Lesion @ 15776009 Pancreas
pancreatic cyst, pancreas cyst = 367643001 Cyst @ 15776009 Pancreas
kidney tumor, renal tumor, renal mass, kidney mass, kidney neoplasm = 108369006 Neoplasm @ 64033007 Kidney
kidney cyst, renal cyst = 367643001 Cyst @ 64033007 Kidney
kidney lesion, renal lesion = 52988006 Lesion @ 64033007 Kidney
prostate lesion, prostate cancer, prostate tumor, prostatic lesion = 52988006 Lesion @ 41216001 Prostate
colon cancer primaries, colon cancer, colon tumor = 108369006 Neoplasm @ 71854001 Colon
bone lesion = 52988006 Lesion @ 3138006 Bone
breast lesion, breast mass = 4147007 Mass @ 76752008 Breast
breast cancer, breast tumor = 108369006 Neoplasm @ 76752008 Breast
thyroid nodule = 27925004 Nodule @ 69748006 Thyroid
cyst = 367643001 Cyst
lesion = 52988006 Lesion
mass = 4147007 Mass
nodule = 27925004 Nodule
tumor, neoplasm, cancer = 108369006 Neoplasm
metastasis, metastases = 14799000 Neoplasm, Secondary
"""
_TISSUES = """
almost entirely fat, breast density a = 129716005 Almost entirely fat @ 76752008 Breast
scattered fibroglandular densities, breast density b = 129717001 Scattered fibroglandular densities @ 76752008 Breast
heterogeneously dense, breast density c = 129718006 Heterogeneously dense @ 76752008 Breast
extremely dense, breast density d = 129719003 Extremely dense @ 76752008 Breast
"""
_SUBSTANCES = """
bile = 70150004 Bile
csf, cerebrospinal fluid = 65216001 Cerebrospinal Fluid
feces = 39477002 Feces
urine = 78014005 Urine
blood = 87612001 Blood
"""

_SPELLINGS = {
    "tumour": "tumor", "tumours": "tumor", "tumors": "tumor", "oedema": "edema", "oesophagus": "esophagus", "haemorrhage": "hemorrhage",
    "nodules": "nodule", "lesions": "lesion", "cysts": "cyst", "grey": "gray", "vertebrae": "vertebra", "adrenals": "adrenal",
    "ischaemic": "ischemic", "masses": "mass", "kidneys": "kidney", "caecum": "cecum", "enlarged": "large",
}  # fmt: skip
_FILLERS = {"of", "the", "and", "in", "structure", "region", "label", "class"}
_LEFT, _RIGHT = {"left", "lt"}, {"right", "rt"}
_NO_FINDING = {"background", "bg", "other", "others", "everything else", "rest", "none", "air", "void"}
_NEGATIVE = {"normal", "negative", "healthy", "no finding", "no findings", "no pneumonia", "non covid", "benign", "absent"}


_PARTS_OF_THE_BRAIN = {
    "cerebellum": {"cerebellar", "vermal", "vermis"},
    "cerebral cortex": {
        "gyrus", "gyri", "sulcus", "cuneus", "precuneus", "insula", "operculum", "opercular", "orbital", "triangular", "planum", "pole",
        "cortex", "entorhinal", "lobule", "subcallosal",
    },
}  # fmt: skip


def term_of(label: str, *, context: str = "") -> Term:
    """Return what a label means. `context` is what the model is for, where labels alone are letters ("A" of breast density)."""
    words = _words(label)
    table = _table()
    found = table.get(_key(words))
    if found is not None:  # the side is part of the structure: a heart's left ventricle lies on neither side of the body
        return found
    side: Laterality | None = "left" if _LEFT & {*words} else "right" if _RIGHT & {*words} else None
    if side is None and len(words) > 1 and words[-1] in ("l", "r"):
        side, words = ("left" if words[-1] == "l" else "right"), words[:-1]
    found = table.get(_key(word for word in words if word not in _LEFT | _RIGHT))
    if found is None and context:
        found = table.get(_key(_words(f"{context} {label}")))
    if found is None and "brain" in _words(context):  # DICOM has no codes for single gyri: the whole that they are part of says less
        whole = next((whole for whole, parts in _PARTS_OF_THE_BRAIN.items() if parts & {*words}), None)
        found = replace(table[_key(_words(whole))], exact=False) if whole else None
    if found is None:
        return Term(category=TISSUE, type=TISSUE, site=TISSUE if side else None, side=side, exact=False)
    if side is None:
        return found
    return Term(category=found.category, type=found.type, site=found.site or found.type, side=side, exact=found.exact)


def find_abnormal(text: str) -> str | None:
    """Return the longest name of an abnormality in a text, such as "lung nodule" of "CT lung nodule detection"."""
    words = _words(text)
    names = _table()
    for length in range(min(5, len(words)), 0, -1):
        for start in range(len(words) - length + 1):
            some = words[start : start + length]
            known = names.get(_key(some))
            if known is not None and known.is_abnormal and (length > 1 or some[0] in ("lesion", "mass", "nodule", "tumor", "hemorrhage")):
                return " ".join(some)
    return None


def is_background(label: str) -> bool:
    """Whether a label stands for what is left when all the others are taken away."""
    return " ".join(_words(label)) in _NO_FINDING


def is_negative(label: str) -> bool:
    """Whether a class of a classification says that nothing was found."""
    return " ".join(_words(label)) in _NEGATIVE or is_background(label)


def terms() -> Iterator[tuple[str, Term]]:
    """Yield each name of the table with its meaning."""
    for category, text in (
        (STRUCTURE, _STRUCTURES + _numbered()),
        (ABNORMAL, _ABNORMAL),
        (TISSUE, _TISSUES),
        (SUBSTANCE, _SUBSTANCES),
    ):
        for line in text.strip().splitlines():
            names, _, rest = line.partition(" = ")
            coded, _, place = rest.partition(" @ ")
            exact = not coded.startswith("~")
            code = _code(coded.removeprefix("~"))
            site = _code(place) if place else code if category is STRUCTURE else None
            term = Term(category=category, type=code, site=site, side=None, exact=exact)
            yield from ((name, term) for name in names.split(", "))


@cache
def _table() -> dict[tuple[str, ...], Term]:
    return {_key(_words(name)): term for name, term in terms()}


def _numbered() -> str:
    ribs = (f"rib {n} = {code} {ordinal} rib" for n, (code, ordinal) in enumerate(zip(_RIBS, _ORDINALS, strict=True), start=1))
    vertebrae = (
        f"vertebra {letter.lower()}{n}, {letter.lower()}{n} vertebra, {letter.lower()}{n} = {code} {letter}{n} vertebra"
        for letter, codes in _VERTEBRAE.items()
        for n, code in enumerate(codes.split(), start=1)
    )
    return "\n".join([*ribs, *vertebrae])


def _code(text: str) -> Code:
    value, _, meaning = text.partition(" ")
    scheme, _, number = value.rpartition(":")
    return Code(value=number, scheme=scheme or "SCT", meaning=meaning)


def _words(label: str) -> list[str]:
    words = re.sub(r"[^a-z0-9]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", label).lower()).split()
    return [spelt for word in words if (spelt := _SPELLINGS.get(word, word)) not in _FILLERS]


def _key(words: Iterator[str] | list[str]) -> tuple[str, ...]:
    return tuple(sorted(words))
