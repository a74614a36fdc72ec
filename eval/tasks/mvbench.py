"""MVBench: twenty kinds of question about short videos. (arXiv 2311.17005)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from eval.scoring.choice import first_word
from eval.tasks.base import Sample, register_task
from eval.tasks.lettered import VideoChoice, letter_of, lettered, letters_for
from eval.tasks.reading import find, need, read_json
from eval.tasks.video import Clip

FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",  # folders of pictures, three a second
    "counterfactual_inference": "clevrer/video_validation",
}
"""Where the videos of a kind lie, below video/."""

ASKED = "Only give the best option."


@register_task
@dataclass(frozen=True)
class MvBench(VideoChoice):
    """The mean of the kinds' means is the figure that papers print; some kinds show a piece of a video only."""

    name: ClassVar[str] = "mvbench"
    licence: ClassVar[str] = "MIT; videos of eleven data sets under their own terms"
    source: ClassVar[str] = "github.com/OpenGVLab/Ask-Anything (video_chat2, MVBench)"
    layout: ClassVar[str] = "json/KIND.json for the twenty kinds; video/star, ssv2_video, clevrer ... as unpacked"
    kinds_count_alike: ClassVar[bool] = True

    frames: int = 16

    def samples(self, folder: Path | None) -> Sequence[Sample]:
        found = []
        for kind, videos in FOLDERS.items():
            path = find(self, folder, f"json/{kind}.json")
            for number, record in enumerate(read_json(path), 1):
                options = [str(each) for each in need(record, "candidates", path, number)]
                file = path.parent.parent / "video" / videos / need(record, "video", path, number)
                asked = f"Question: {need(record, 'question', path, number)}\nOptions:"
                found.append(
                    Sample(
                        id=f"{kind}-{number}",
                        question=f"{asked}\n{lettered(options, '({letter}) {text}')}\n{ASKED}",
                        video=Clip(file, self.frames, record.get("start"), record.get("end")),
                        target=letter_of(str(need(record, "answer", path, number)), options, path, number),
                        group=str(file.relative_to(path.parent.parent)),
                        options=letters_for(options, path, number),
                        meta={"kind": kind},
                    )
                )
        return found

    def read(self, sample: Sample, prediction: str) -> str | None:
        """The first word."""
        return first_word(prediction, sample.options or ())
