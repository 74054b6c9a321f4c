"""What the page says."""

HEADER = """
<header><h1>moveimg</h1>
<p>A class label in, pictures out, one discrete code after another.</p></header>
"""

HINT = (
    '<div class="status"><span class="keys">Press <kbd>Enter</kbd> to draw and <kbd>Esc</kbd> to '
    "stop. </span>"
    "The same class, settings and seed give the same picture.</div>"
)

HELP = {
    "cfg_scale": "How hard to push towards the class; 1 is not at all.",
    "cfg_schedule": "How guidance grows from 1 to its full value along the picture.",
    "temperature": "Below 1 safer and more alike, above 1 wilder; 0 takes the likeliest code.",
    "top_k": "Draw among the k likeliest codes only; 0 is all.",
    "top_p": "Draw among the likeliest codes that reach this probability; 1 is all.",
    "seed": "A number makes the same pictures again; empty gives new ones each time.",
}

MEMORY = (
    '<p class="what">The model keeps a bank of value vectors for every code. In each layer a gate '
    "decides how much of it joins the layer's own values. <b>Choose a picture above</b> to see "
    "where each layer leaned on the bank while it read that picture.</p>"
)

RECONSTRUCT = (
    '<p class="what">The model never sees pixels: a tokenizer turns an image into a small grid of '
    "codes and paints it again from them. What it cannot keep, no picture here can have. The "
    "centre of your image is taken; the file is not stored.</p>"
)

UPLOAD = (
    '<label class="upload"><input type="file" accept="image/*" aria-label="image to reconstruct">'
    "<span><b>Choose an image</b>, drop one here, or paste it</span></label>"
)

API_PYTHON = """\
import base64
from gradio_client import Client

client = Client("http://127.0.0.1:7860")
result = client.predict(class_name="seven", num=2, seed=0, api_name="/generate")
for picture in result["images"]:
    with open(f"seed{picture['seed']}.png", "wb") as file:
        file.write(base64.b64decode(picture["png"].split(",")[1]))
"""

API_SHELL = """\
id=$(curl -s -X POST http://127.0.0.1:7860/gradio_api/call/v2/generate \\
       -H 'Content-Type: application/json' -d '{"class_name": "seven", "num": 2, "seed": 0}' \\
     | cut -d'"' -f4)
curl -sN http://127.0.0.1:7860/gradio_api/call/generate/$id
"""

API = f"""
Everything on this page can be called by name. Arguments left out take the model's own settings;
pictures come as `data:image/png;base64,...` with their settings in the PNG's text chunk `moveimg`.

```python
{API_PYTHON}```

Over plain HTTP, a first request joins the line and a second one waits for the result:

```sh
{API_SHELL}```

Where the demo asks for a password: `Client(..., auth=("user", "password"))`; with curl, log in
by `curl -c cookies -d 'username=...&password=...' http://127.0.0.1:7860/login`, and add
`-b cookies` to both requests.

| endpoint | arguments | answer |
| --- | --- | --- |
| `/generate` | `class_name` (index, name or part of one; empty: random), `num`, `seed`, `model`, \
`cfg_scale`, `temperature`, `top_k`, `top_p`, `cfg_schedule`, `bank` (false: slots at zero) \
| `model`, `settings`, `images` |
| `/vary_guidance` | `class_name`, `scales` (a list), `num`, `seed`, `model` | `rows`, one a scale |
| `/compare` | `class_name`, `models` (two names), `num`, `seed` | `rows`, one a model |
| `/memory` | `class_name`, `seed`, `model` | `image`, and of each layer `share`, `gates` \
(grids of 0..1), `g_0`, `slots` |
| `/reconstruct` | `image` (data URI or base64), `model` | `mse`, `psnr`, `codes`, `image` |
| `/classes` | `search`, `model` | `index` and `name` of each class that fits |
| `/models` | | name, number of classes, grid and settings of each model |

Every visitor has a fair share of the line: a request beyond it is refused with a message, and so
are numbers out of bounds.
"""
