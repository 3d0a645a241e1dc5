"""The demo's second language: the same assistant spoken to in Mandarin, a smaller grammar of few characters.

Simplified characters without spaces or punctuation, numbers spelled out. A word is a character here, so what sounds
alike are characters (王芳, 王方), and these occur in names only. A character with several readings stands only in words
that espeak-ng's dictionary reads right (银行, 音乐, 空调).
"""

from .grammar import Grammar, Intent, listed

_HOMOPHONES = tuple(tuple(group.split()) for group in listed("""
    芳 方, 娜 那, 洋 阳, 丽 莉, 杰 洁, 军 君, 涛 滔"""))  # fmt: skip

_SLOTS: dict[str, tuple[str, ...]] = {
    "person": listed("{surname}{given}"),
    "surname": listed("张, 王, 李, 刘, 陈"),
    "given": listed("{alike}, {distinct}"),
    "alike": tuple(name for group in _HOMOPHONES for name in group),
    "distinct": listed("伟, 敏"),
    "who": listed("{person}, {person}, {person}, {person}, 妈妈, 爸爸"),
    "city": listed("北京, 上海, 南京, 西安"),
    "place": listed("机场, 火车站, 银行, 学校"),
    "destination": listed("{place}, {city}"),
    "digit": listed("一, 二, 三, 四, 五, 六, 七, 八, 九"),
    "minutes": listed("五, 十, 十五, 二十, 三十, 四十, 五十"),
    "hour": listed("一, 两, 三, 四, 五, 六, 七, 八, 九, 十, 十一, 十二"),
    "clock": listed("{hour}点, {hour}点半, {hour}点{minutes}分"),
    "part": listed("早上, 下午, 晚上"),
    "time": listed("{clock}, {part}{clock}, {part}{clock}"),
    "weekday": listed("一, 二, 三, 四, 五, 六, 日"),
    "day": listed("今天, 明天, 后天, 周{weekday}, 周{weekday}, 下周{weekday}"),
    "degrees": listed("二十度, 二十{digit}度, 十八度, 三十度"),
    "message": listed("我到家了, 我晚点到, 我在{destination}, {day}见, {time}见, 会议取消了, {day}吃饭吗"),
    "song": listed("音乐, 新歌, {person}的歌, {person}的歌, {person}的新歌"),
    "room": listed("客厅, 卧室"),
    "device": listed("灯, 空调, 电视"),
    "event": listed("开会, 吃饭, 打电话, 去{destination}, 去{destination}"),
}  # fmt: skip

_INTENTS: dict[str, Intent] = {
    "call": Intent(14, listed("""
        打电话给{who}, 给{who}打电话, {time}打电话给{who}, 打{person}的电话, 给{person}和{who}打电话""")),
    "message": Intent(18, listed("""
        告诉{who}{message}, 告诉{who}{message}, 给{who}发消息说{message}, 发消息给{who}, {who}发消息了吗""")),
    "weather": Intent(12, listed("""
        {day}天气怎么样, {city}{day}天气怎么样, {city}{day}会下雨吗, {day}{city}多少度, {city}现在多少度,
        {city}{day}{part}会下雨吗""")),
    "alarm": Intent(10, listed("设一个{time}的闹钟, 设{day}{time}的闹钟, 取消{time}的闹钟, 取消{day}{time}的闹钟")),
    "reminder": Intent(10, listed("""
        {time}提醒我{event}, {day}提醒我{event}, {minutes}分钟后提醒我{event}, 提醒我{day}和{who}{event}""")),
    "music": Intent(7, listed("播放{song}, 在{room}播放{song}, {minutes}分钟后播放{song}, 打开{song}")),
    "home": Intent(9, listed("""
        打开{room}的{device}, 关上{room}的{device}, 空调调到{degrees}, {room}的空调调到{degrees},
        {time}打开{room}的{device}, {minutes}分钟后关上{room}的{device}""")),
    "navigation": Intent(8, listed("""
        去{destination}怎么走, 去{destination}要多少分钟, {day}去{city}的火车, {day}{time}去{city}的火车,
        {city}的{place}怎么走""")),
    "calendar": Intent(9, listed("""
        {day}{time}和{person}开会, {day}和{person}{event}, 取消{day}和{person}的会议, {day}{part}要开会吗,
        和{person}的会议什么时间开""")),
    "question": Intent(3, listed("{city}现在什么时间, 现在什么时间, {place}什么时间开, {city}的{place}什么时间开")),
}  # fmt: skip

# As a contact list would hold them: whole names.
NAMES_ALIKE = tuple(tuple(surname + given for given in group) for surname in _SLOTS["surname"] for group in _HOMOPHONES)

MANDARIN = Grammar(
    slots=_SLOTS,
    intents=_INTENTS,
    keyword_slots=("person", "city"),
    homophones=_HOMOPHONES,
    lengths=range(4, 15),
    space="",
)
