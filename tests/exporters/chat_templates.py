"""Chat templates of several habits, in Jinja, as published models have them."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN_SYSTEM = (  # SmolLM2's, Qwen 2's
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"small\" {and} helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + '</s>' }}"
    "{% endfor %}"
)
TRIMS = (  # Gemma's: the system message opens the first question
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in turns %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (first if loop.first else '') + m['content'] | trim }}{{ '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
TRIMS_ALL = TRIMS.replace("messages[0]['content'] + '\n\n'", "(messages[0]['content'] | trim) + '\n\n'")
FORGETS = (  # Qwen 3's: thoughts of earlier answers are left out
    "{% for m in messages %}{% set said = m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' "
    "else m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTS = "{% for m in messages %}{{ loop.index ~ ': ' ~ m['content'] ~ '\n' }}{% endfor %}"  # no fixed text writes this
SHOUTS = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
