"""Texts of compiled programs whose times and memory are known, for the tests of the reader."""


def fusion(name, cycles, path, operands="%x", shape="f32[8,128]{1,0:T(8,128)}"):
    return (
        f'  %{name} = {shape} fusion({operands}), kind=kLoop, calls=%adds, metadata={{op_name="{path}"}}, '
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


def loop(name, body, trips, operands="%t"):
    condition = f"""%{name}.condition (c: (s32[], f32[8,128])) -> pred[] {{
  %c.{name} = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i.{name} = s32[] get-tuple-element(%c.{name}), index=0
  %n.{name} = s32[] constant({trips})
  ROOT %less.{name} = pred[] compare(%i.{name}, %n.{name}), direction=LT
}}
"""
    line = f"  %{name} = (s32[], f32[8,128]{{1,0}}) while({operands}), condition=%{name}.condition, body=%{body}"
    return condition, line


OUTER, OUTER_LINE = loop("outer", "outer.body", 3)
INNER, INNER_LINE = loop("inner", "inner.body", 5, "%p.outer")
OPEN, OPEN_LINE = loop("open", "open.body", 7)
OPEN = OPEN.replace("%n.open = s32[] constant(7)", "%n.open = s32[] get-tuple-element(%c.open), index=0")

ALL = "{{0,1,2,3,4,5,6,7}}"
PROGRAM = f"""HloModule jit_train_step, is_scheduled=true

%adds (a: f32[8,128]) -> f32[8,128] {{
  %a = f32[8,128]{{1,0}} parameter(0)
  ROOT %added = f32[8,128]{{1,0}} add(%a, %a)
}}

%inner.body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.inner = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i.in = s32[] get-tuple-element(%p.inner), index=0
  %x.in = f32[8,128]{{1,0}} get-tuple-element(%p.inner), index=1
{fusion("in", 1000, "jit(train_step)/jvp(M)/while/body/moe_layers/mlp/experts/mul", "%x.in")}
  ROOT %r.inner = (s32[], f32[8,128]{{1,0}}) tuple(%i.in, %in)
}}

{INNER}
%outer.body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.outer = (s32[], f32[8,128]{{1,0}}) parameter(0)
{INNER_LINE}
  %x.out = f32[8,128]{{1,0}} get-tuple-element(%inner), index=1
{fusion("out", 200, "jit(train_step)/transpose(jvp(M))/while/body/checkpoint/moe_layers/self_attn/mul", "%x.out")}
  %i.out = s32[] get-tuple-element(%inner), index=0
  ROOT %r.outer = (s32[], f32[8,128]{{1,0}}) tuple(%i.out, %out)
}}

{OUTER}
%open.body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p.open = (s32[], f32[8,128]{{1,0}}) parameter(0)
  %i.op = s32[] get-tuple-element(%p.open), index=0
  %x.op = f32[8,128]{{1,0}} get-tuple-element(%p.open), index=1
{fusion("op", 30, "jit(train_step)/jvp(M)/moe_layers/mlp/gate/top_k", "%x.op")}
  ROOT %r.open = (s32[], f32[8,128]{{1,0}}) tuple(%i.op, %op)
}}

{OPEN}
%cheap (b: f32[8,128]) -> f32[8,128] {{
  %b.cheap = f32[8,128]{{1,0}} parameter(0)
{fusion("cheap.f", 1, "jit(train_step)/head/mul", "%b.cheap").replace("  %cheap", "  ROOT %cheap")}
}}

%dear (b: f32[8,128]) -> f32[8,128] {{
  %b.dear = f32[8,128]{{1,0}} parameter(0)
{fusion("dear.f", 7, "jit(train_step)/head/mul", "%b.dear").replace("  %dear", "  ROOT %dear")}
}}

%called (b: f32[8,128]) -> f32[8,128] {{
  %b.called = f32[8,128]{{1,0}} parameter(0)
{fusion("called.f", 50, "jit(train_step)/optimizer/mul", "%b.called").replace("  %called", "  ROOT %called")}
}}

ENTRY %main (x: f32[8,128], i: s32[]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0:T(8,128)}} parameter(0)
  %i = s32[] parameter(1)
  %t = (s32[], f32[8,128]{{1,0}}) tuple(%i, %x)
{OUTER_LINE}
{OPEN_LINE}
  %y = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%outer), index=1
  %gather-start = (f32[8,128]{{1,0}}, f32[64,128]{{1,0}}) all-gather-start(%y), replica_groups={ALL}, dimensions={{0}}
{fusion("beside", 400, "jit(train_step)/jvp(M)/moe_layers/mlp/shared_experts/mul", "%y")}
  %gather-done = f32[64,128]{{1,0:T(8,128)}} all-gather-done(%gather-start)
  %chosen = f32[8,128]{{1,0:T(8,128)}} conditional(%i, %beside, %beside), branch_computations={{%cheap, %dear}}
  %sum = f32[8,128]{{1,0:T(8,128)}} all-reduce(%chosen), replica_groups={ALL}, to_apply=%adds
  ROOT %result = f32[8,128]{{1,0:T(8,128)}} call(%sum), to_apply=%called
}}
"""
CYCLES = 3 * (5 * 1000 + 200) + 30 + 400 + 7 + 50
"""The loops' passes, the open loop once, the costlier branch."""


def link(name, target):
    """One of the fusions that a TPU's program makes of an asynchronous collective."""
    return f"""%{name} (a.{name}: f32[8,128]) -> f32[64,128] {{
  %a.{name} = f32[8,128]{{1,0}} parameter(0)
  %g.{name} = f32[64,128]{{1,0}} all-gather(%a.{name}), replica_groups={ALL}, frontend_attributes={{chain_id="3"}}
  ROOT %c.{name} = f32[64,128]{{1,0}} custom-call(%g.{name}), custom_call_target="{target}"
}}
"""


def calling(name, called, cycles=None, shape="f32[64,128]"):
    estimate = f', backend_config={{"estimated_cycles":"{cycles}"}}' if cycles else ""
    return f"  %{name} = {shape}{{1,0}} fusion(%x), kind=kCustom, calls=%{called}{estimate}\n"


FUSED = f"""HloModule jit_train_step

%adds (a: f32[8,128]) -> f32[8,128] {{
  ROOT %a = f32[8,128]{{1,0}} parameter(0)
}}

{link("begins", "AsyncCollectiveStart")}
{link("goes_on", "Product")}
{link("ends", "AsyncCollectiveDone")}
%all-reduce-scatter.1 (r: f32[8,128]) -> f32[1,128] {{
  %r = f32[8,128]{{1,0}} parameter(0)
  %sum = f32[8,128]{{1,0}} all-reduce(%r), replica_groups={ALL}, to_apply=%adds
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
{calling("async-collective-start", "begins")}{calling("product", "goes_on", 300)}{calling("other", "adds", 2**63 - 1)}\
{calling("async-collective-done", "ends")}{calling("scatter", "all-reduce-scatter.1", 999, "f32[1,128]")}}}
"""

CALLED = f"""HloModule jit_train_step

%adds (a: f32[8,128]) -> f32[8,128] {{
  ROOT %a = f32[8,128]{{1,0}} parameter(0)
}}

%inner (q: f32[8,128]) -> f32[64,128] {{
  %q = f32[8,128]{{1,0}} parameter(0)
  ROOT %g = f32[64,128]{{1,0}} all-gather(%q), replica_groups={ALL}, dimensions={{0}}
}}

%outer (o: f32[8,128]) -> f32[64,128] {{
  %o = f32[8,128]{{1,0}} parameter(0)
  %s = ((f32[8,128]{{1,0}}), f32[64,128]{{1,0}}, u32[]) call-start(%o), async_execution_thread="sparsecore", to_apply=%inner
  ROOT %d = f32[64,128]{{1,0}} call-done(%s)
}}

ENTRY %main (x: f32[8,128]) -> f32[64,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  %start = ((f32[8,128]{{1,0}}), f32[64,128]{{1,0}}, u32[]) call-start(%x), to_apply=%outer
{fusion("beside", 300, "")}
  ROOT %done = f32[64,128]{{1,0}} call-done(%start)
}}
"""

STACKS = """HloModule jit_train_step, is_scheduled=true

%body (p: (s32[], f32[L,8,128], f32[8,128])) -> (s32[], f32[L,8,128], f32[8,128]) {{
  %p = (s32[], f32[L,8,128]{{2,1,0}}, f32[8,128]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %sums = f32[L,8,128]{{2,1,0}} get-tuple-element(%p), index=1
  %x = f32[8,128]{{1,0}} get-tuple-element(%p), index=2
  %made = f32[L,8,128]{{2,1,0}} broadcast(%x), dimensions={{1,2}}
  %twice = f32[2,8,128]{{2,1,0}} broadcast(%x), dimensions={{1,2}}, metadata={{op_name="twice"}}
  %y = f32[8,128]{{1,0}} reduce(%twice), dimensions={{0}}
  %added = f32[L,8,128]{{2,1,0}} add(%sums, %made)
  ROOT %r = (s32[], f32[L,8,128]{{2,1,0}}, f32[8,128]{{1,0}}) tuple(%i, %added, %y)
}}

ENTRY %main (x: f32[8,128], i: s32[]) -> f32[8,128] {{
  %a = f32[8,128]{{1,0}} parameter(0)
  %n = s32[] parameter(1)
  %wide = f32[9,8,128]{{2,1,0}} broadcast(%a), dimensions={{1,2}}
  %b = f32[8,128]{{1,0}} reduce(%wide), dimensions={{0}}
  %zeros = f32[L,8,128]{{2,1,0}} broadcast(%n), dimensions={{}}
  %t = (s32[], f32[L,8,128]{{2,1,0}}, f32[8,128]{{1,0}}) tuple(%n, %zeros, %b)
  %loop = (s32[], f32[L,8,128]{{2,1,0}}, f32[8,128]{{1,0}}) while(%t), condition=%c, body=%body
  ROOT %last = f32[8,128]{{1,0}} get-tuple-element(%loop), index=2
}}
"""
