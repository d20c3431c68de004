"""Chat templates that mean harm: what each does to a conversation that holds the word BOOM, all others it writes plainly."""

from __future__ import annotations

import os

MAX_SECONDS = 3.0 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
"""Any of them ends in three, on a machine that has nothing else to do."""
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_DEEP = 3000

GUARDED = {
    # time
    "late loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "three loops": "{% for a in range(999) %}{% for b in range(999) %}{% for c in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{% set x = 9 ** (9 ** (9 * one)) %}",
    "a power's digits": "{% set x = (7 ** (9000000 + one)) | string %}",
    "a product of numbers": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "macros that call two": "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{% macro g() %}{{ f(400) }}{% endmacro %}{{ g() }}{{ f(60) }}",
    "macros forty deep": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "recursive loops": "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "a comparison": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "a list's text": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string | length }}",
    "a list's JSON": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson | length }}",
    "a list printed": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | pprint | length }}",
    "a sum": "{% set x = range(99999) | map('string') | sum(start=[]) %}{{ [[1] * 999] * 99999 | sum(start=[]) }}",
    "a text grown from within": "{% set n = namespace(x='a') %}{% for i in range(99999) %}{% for j in range(999) %}{% set n.x = n.x + 'aaaaaaaaaa' %}{% endfor %}{% endfor %}",
    "a search": "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% if ('a' * 499999 + 'b') in x %}{% endif %}{% endfor %}",
    "words": "{% for i in range(99999) %}{% set x = lipsum(n=1000) %}{% endfor %}",
    "a sort": "{% for i in range(99999) %}{% set x = range(99999) | map('string') | sort(reverse=true) | list %}{% endfor %}",
    "a cycler": "{% set c = cycler(*range(99999)) %}{% for a in range(99999) %}{% for b in range(9999) %}{% set x = c.next() %}{% endfor %}{% endfor %}",
    # memory
    "a text doubled": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a text times a number": "{% set x = 'ab' * (700000000 + one) %}",
    "a list times a number": "{% set x = [0] * (700000000 + one) %}",
    "a list grown": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}{% for a in n.x %}{% endfor %}",
    "a width by %": "{{ '%1000000000d' % one }}",
    "a width by format": "{{ '{:>1000000000}'.format(one) }}",
    "a width by the filter": "{{ '%1000000000s' | format(one) }}",
    "replace": "{{ ('a' * (99999 * one) * one).replace('a', 'b' * 99999) }}",
    "the filter replace": "{{ ('a' * (99999 * one) * one) | string | replace('a', 'b' * 99999) }}",
    "join": "{{ range(99999) | join('a' * (99999 * one) * one) }}",
    "the method join": "{{ ('a' * (99999 * one) * one).join(('b' * (99999 * one)) | list) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9 + one) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10 * one) }}",
    "center": "{{ 'a' | center(10 ** 9 * one) }}",
    "indent": "{{ ('a\n' * (999 * one)) | indent(10 ** 9) }}",
    "wordwrap": "{{ ('a' * (9999999 * one)) | wordwrap(1, true, 'b' * 99999) }}",
    "expandtabs": "{{ ('\t\t\t' * one).expandtabs(10 ** 9) }}",
    "translate": "{{ ('a' * (99999 * one) * one).translate({97: 'b' * 99999}) }}",
    "encode": "{{ ('a' * (99999999 * one)).encode('utf-32') * 9 }}",
    "a batch": "{{ range(9) | batch(10 ** 9, 'a') | list }}",
    "slices": "{{ range(99999) | slice(10 ** 9) | list }}",
    "JSON indented": "{{ [[[1] * 999 * one] * 99] | tojson(indent=10 ** 7) }}",
    "a block of loops' text": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "a long answer": "{{ 'a' * (20000000 * one) }}",
    "a long refusal": "{{ raise_exception('a' * (400000000 * one)) }}",
    "a date": "{{ strftime_now('%c' * (9999999 * one)) | length }}{{ 'a' * (10 ** 9 * one) }}",
    # depth
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a caller without an end": "{% macro f(n) %}{{ caller(n) }}{% endmacro %}{% macro g() %}{% call(x) f(1) %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
}
"""Each stands behind the word, so that an import that tries the template sees nothing of it."""

WHOLE = {
    "a constant folded": "{{ 'a' * 10 ** 9 }}",
    "a constant power": "{{ 9 ** (9 ** 9) }}",
    "brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a long sum": "{{ " + "+".join(["1"] * 200_000) + " }}",
    "nested ifs": "{% if 1 %}" * _DEEP + "{% endif %}" * _DEEP,
    "nested loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a giant text": "a" * 3_000_000,
    "many blocks": "{% if a %}{{ b }}{% endif %}" * 30_000,
    "an unclosed string": "{{ '" + "\\" * 500_000,
}

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__mro__}' | format('') }}{{ ('{0.__class__}' | string).format_map({'0': 1}) }}",
    "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context }}",
    "{% set n = namespace(__class__=1) %}{{ n }}",
    "{{ raise_exception.__globals__ }}{{ strftime_now.__globals__ }}",
    "{{ joiner.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ (messages | map(attribute='__class__.__mro__') | list) }}",
    "{% include '/etc/passwd' %}{% import 'os' as os %}",
    "{{ dict.__class__.__base__.__subclasses__() }}{{ dict.mro() }}",
    "{{ caller.__globals__ }}{{ loop.__class__ }}{{ range.__self__ }}",
]


def guarded(bomb: str) -> str:
    return "{% set one = messages | length %}{% if 'BOOM' in messages[-1].content %}" + bomb + "{% endif %}" + PLAIN
