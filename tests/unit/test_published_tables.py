"""Promises of reading the tables of public archives as they are published: their names and headers to the letter, above
made-up rows that have the quirks of theirs."""

from pathlib import Path
from typing import Any

import pytest

from cxr_retrieval.config import CorpusSettings
from cxr_retrieval.corpus.findings import FINDINGS
from cxr_retrieval.corpus.formats import FORMATS
from cxr_retrieval.corpus.formats.labels import Box, Label
from cxr_retrieval.storage import StoredFile

NIH_FIRST = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
NIH_2020 = NIH_FIRST[:-1]
NIH_NOW = NIH_2020.replace("Patient Gender", "Patient Sex")
CHEXPERT = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)
MIMIC = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
MIMIC_STUDIES = (
    "subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,Enlarged Cardiomediastinum,Fracture,Lung Lesion,"
    "Lung Opacity,No Finding,Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices"
)
PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,"
    "PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,RelativeXRayExposure_DICOM,ReportID,"
    "Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)
PADCHEST_FILM = (
    "CR,SomeCompany,MONOCHROME2,0,\"['1', '1']\",0.143,12,2047.0,4095.0,2968,2973,None,None,None,None,None,7,"
    '"sin hallazgos , "" normal "" .",RNN_model'
)
VINDR_CLASSES = (
    "Aortic enlargement,Atelectasis,Calcification,Cardiomegaly,Clavicle fracture,Consolidation,Edema,Emphysema,"
    "Enlarged PA,ILD,Infiltration,Lung Opacity,Lung cavity,Lung cyst,Mediastinal shift,Nodule/Mass,Pleural effusion,"
    "Pleural thickening,Pneumothorax,Pulmonary fibrosis,Rib fracture,Other lesion,COPD,Lung tumor,Pneumonia,"
    "Tuberculosis"
)
SEEN_ATELECTASIS, SEEN_DISEASE = ",".join("01" + "0" * 26), ",".join("0" * 26 + "10")

# Of each archive: its tables by their paths, and what some of the fields of each image's label are.
ARCHIVES: dict[str, tuple[str, dict[str, list[str]], dict[str, dict[str, Any]]]] = {
    "NIH's first edition": (
        "nih",
        {
            "Data_Entry_2017.csv": [
                NIH_FIRST,
                "00000007_000.png,No Finding,000,00007,058Y,M,PA,2682,2749,0.14300000000000002,0.14300000000000002,",
                "00000008_001.png,Pleural_Thickening|Hernia,001,00008,414Y,F,AP,2992,2991,0.143,0.143,",
            ]
        },
        {
            "00000007_000.png": {"patient": "00007", "follow_up": 0, "age_years": 58, "findings": [], "sex": "M"},
            "00000008_001.png": {"age_years": None, "findings": ["Pleural_Thickening", "Hernia"], "view": "AP"},
        },
    ),
    "NIH's edition of 2020": (
        "nih",
        {"Data_Entry_2017_v2020.csv": [NIH_2020, "00000007_002.png,Mass|Edema,2,7,60,F,PA,2500,2048,0.168,0.168"]},
        {
            "00000007_002.png": {
                "patient": "7",
                "follow_up": 2,
                "age_years": 60,
                "findings": ["Mass", "Edema"],
                "sex": "F",
            }
        },
    ),
    "NIH's edition of now": (
        "nih",
        {"Data_Entry_2017_v2020.csv": [NIH_NOW, "00000007_002.png,Mass,2,7,60,F,PA,2500,2048,0.168,0.168,"]},
        {"00000007_002.png": {"sex": "F", "findings": ["Mass"], "view": "PA"}},
    ),
    "CheXpert": (
        "chexpert",
        {
            "CheXpert-v1.0-small/train.csv": [
                CHEXPERT,
                "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0",
                "CheXpert-v1.0-small/train/patient00002/study2/view2_lateral.jpg,Unknown,0,Lateral,,,,-1.0,1.0,,-1.0,,,,,1.0,,,",
                "CheXpert-v1.0-small/train/patient00003/study1/view1_frontal.jpg,Male,90,Frontal,RL,,,,,1.0,,,,,,,,,",
            ],
            "CheXpert-v1.0-small/valid.csv": [
                CHEXPERT,
                f"CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP{',0.0' * 13},1.0",
            ],
        },
        {
            "patient00001/study1/view1_frontal.jpg": {
                "patient": "patient00001",
                "findings": [],
                "other": ["Support Devices"],
            },
            "patient00002/study2/view2_lateral.jpg": {
                **{"age_years": None, "sex": None, "view": "LATERAL", "study": "patient00002_study2"},
                **{"findings": ["Effusion"], "other": ["Lung Opacity"]},
            },
            "patient00003/study1/view1_frontal.jpg": {"view": "RL", "findings": [], "unknown": list(FINDINGS)},
            "patient64541/study1/view1_frontal.jpg": {
                "unknown": ["Infiltration", "Emphysema", "Fibrosis", "Hernia"],
                "age_years": 73,
            },
        },
    ),
    "MIMIC-CXR-JPG": (
        "mimic",
        {
            "mimic-cxr-2.0.0-metadata.csv": [
                MIMIC,
                "02aa-bd,10000001,50000001,CHEST (PA AND LAT),PA,3056,2544,21800506,213014.531,CHEST (PA AND LAT),"
                "postero-anterior,Erect",
                "17ff-ac,10000001,50000001,CHEST (PA AND LAT),LL,2544,3056,21800506,213014.5,CHEST,lateral,",
                "3b5e-09,10000002,50000002,CHEST (PORTABLE AP),,2544,3056,21791130,1243.0,CHEST (PORTABLE AP),,",
            ],
            "mimic-cxr-2.0.0-chexpert.csv": [
                MIMIC_STUDIES,
                "10000001,50000001,,,,-1.0,,,,1.0,,1.0,,,0.0,",
                "10000002,50000002,,,,,,,,,1.0,,,,,",
            ],
        },
        {
            "02aa-bd": {"patient": "10000001", "study": "50000001", "view": "PA", "findings": ["Effusion"]},
            "17ff-ac": {"view": "LATERAL", "findings": ["Effusion"], "other": ["Lung Opacity"]},
            "3b5e-09": {"view": None, "findings": [], "unknown": ["Infiltration", "Emphysema", "Fibrosis", "Hernia"]},
        },
    ),
    "PadChest": (
        "padchest",
        {
            "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv": [
                PADCHEST,
                "0,111_a.png,0,20140915,111,901,1930.0,F,POSTEROANTERIOR,PA,Manual review of DICOM fields,No,"
                f"{PADCHEST_FILM},\"['consolidation', ' pleural effusion', 'unchanged']\",\"['loc right']\",[],[],[]",
                "1,-222-333_b.png,54,20150804,222,902,,O,nan,AP_horizontal,Manual review of DICOM fields,PED,"
                f"{PADCHEST_FILM},['normal'],[],[],[],[]",
                f"3,444_c.png,3,20150804,444,904,1957.0,nan,nan,COSTAL,Manual,No,{PADCHEST_FILM},nan,nan,nan,nan,nan",
                f"4,555_d.png,3,20150804,555,905,1957.0,M,nan,L,Manual,No,{PADCHEST_FILM},[''],[],[],[],[]",
            ]
        },
        {
            "111_a.png": {
                **{"patient": "901", "study": "111", "age_years": 84, "sex": "F", "view": "PA"},
                **{"findings": ["Effusion", "Infiltration", "Consolidation"], "other": []},
            },
            "-222-333_b.png": {"age_years": None, "sex": "O", "view": "AP", "findings": [], "unknown": []},
            "444_c.png": {"sex": None, "view": "COSTAL", "unknown": list(FINDINGS), "reason": None},
            "555_d.png": {"view": "LATERAL", "unknown": list(FINDINGS), "reason": None},
        },
    ),
    "VinDr-CXR": (
        "vindr",
        {
            "annotations/image_labels_train.csv": [
                f"image_id,rad_id,{VINDR_CLASSES},Other diseases,No finding",
                *(f"0a1b,R{n},{SEEN_ATELECTASIS}" for n in (8, 9, 10)),
            ],
            "annotations/image_labels_test.csv": [
                f"image_id,{VINDR_CLASSES},Other disease,No finding",
                f"2c3d,{SEEN_DISEASE}",
            ],
        },
        {
            "0a1b": {"patient": "0a1b", "findings": ["Atelectasis"], "unknown": ["Hernia"], "other": []},
            "2c3d": {"findings": [], "unknown": ["Hernia"], "other": ["Other disease"]},
        },
    ),
}


def written(folder: Path, layout: str, tables: dict[str, list[str]]) -> dict[str, StoredFile]:
    """The tables by the kinds that the format takes them for."""
    found = {}
    for path, lines in tables.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join(lines) + "\n")
        kind = FORMATS[layout].table_kind(path)
        assert kind is not None, path
        found[kind] = StoredFile(path, str(folder / path), 0, 0.0)
    return found


@pytest.mark.parametrize("archive", ARCHIVES)
def test_the_tables_of_an_archive_are_read_as_they_are_published(archive: str, tmp_path: Path) -> None:
    layout, tables, told = ARCHIVES[archive]
    found = FORMATS[layout](CorpusSettings(format=layout))
    kinds = written(tmp_path, layout, tables)
    assert set(found.needs) <= set(kinds)
    labels: dict[str, Label] = {label.image: label for label in found.labels(kinds)}
    assert list(labels) == list(told)
    for image, facts in told.items():
        assert {name: getattr(labels[image], name) for name in facts} == facts
        assert labels[image].patient
        assert labels[image].reason is None


def test_the_boxes_of_nih_and_vindr_are_read_as_they_are_published(tmp_path: Path) -> None:
    rows = ["00000007_002.png,Infiltrate,225.084745762712,547.019216763771,86.7796610169491,79.1864406779661,,,"]
    kinds = written(tmp_path, "nih", {"BBox_List_2017.csv": ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows]})
    (box,) = FORMATS["nih"](CorpusSettings()).boxes(kinds)
    assert (box.finding, round(box.x), round(box.y), round(box.w), round(box.h)) == ("Infiltration", 225, 547, 87, 79)
    drawn = {
        "annotations/annotations_train.csv": [
            "image_id,rad_id,class_name,x_min,y_min,x_max,y_max",
            "0a1b,R8,Atelectasis,691.0,1375.0,1653.0,1831.0",
            "0a1b,R9,No finding,,,,",
        ],
        "annotations/annotations_test.csv": [
            "image_id,class_name,x_min,y_min,x_max,y_max",
            "2c3d,Other disease,1,2,3,4",
        ],
    }
    kinds = written(tmp_path, "vindr", ARCHIVES["VinDr-CXR"][1] | drawn)
    assert list(FORMATS["vindr"](CorpusSettings(format="vindr")).boxes(kinds)) == [
        Box("0a1b", "Atelectasis", 691.0, 1375.0, 962.0, 456.0),
        Box("2c3d", "Other disease", 1.0, 2.0, 2.0, 2.0),  # none of the 14: counted, and not kept
    ]
